"""The models that others trained: RobustBench's zoo, timm, torchvision and the Hugging Face Hub.

To list the zoo needs no torch: nothing is imported here.
"""
