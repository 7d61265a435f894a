"""One file per model family: how its config.json is read, which weights it has, what engines hold of them, what is refused.

``registry.py`` lists the families; ``base/`` has the words and the parts that their files are written in. Nothing here imports
torch, so that the checks of a config read models with the same code as the trainer (docs/add_a_family.md).
"""
