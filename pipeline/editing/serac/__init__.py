"""SERAC (arXiv 2206.06520): edits in a memory, a classifier of their scope, and a small model h.

The edited model's weights stay as they are. A query x is compared with every stored edit; where the
nearest one's scope holds it, h answers x behind the text of that edit, and otherwise the edited
model answers as it always did.
"""
