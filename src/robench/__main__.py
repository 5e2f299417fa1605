from robench.benchmark.cli import main

main()
