"""Networks that turn what an edit says of a weight, as factors, into the weight's update.

They are trained on many edits (`methods/hypernetworks.py`). What they edit are the down-projections
of some layers; matrices of one shape share a network.

Shapes: R rows (tokens) whose factors are taken, F key size, D hidden size, E = F + D.
"""
