"""What phases reach of a machine's rate, and what takes time beside arithmetic; measured."""

EFFICIENCY = {
    "values": 0.45,
    "gradients": 0.43,
    "attribution": 0.40,
    "keys": 0.27,
    "scoring": 0.40,
    "generation": 0.10,
    "general": 0.40,
    "covariance": 0.55,
    "merge": 0.5,
    "network": 0.40,
}
"""Share of the matrix rate that a phase reaches, by the counts of `pipeline.planning.flops`.

Measured with counterfact-12m in float32, 2 workers of 1 thread that reached 90 GFLOP/s in matrix
products: values 42, keys 24 to 27, scoring 32 to 38 and covariance 50 GFLOP/s (the phases' seconds
of runs of 1,000 and 10,000 edits; `python -m benchmarks.values` and its like measure them one by
one). Passes with gradients reached 0.42 to 0.46 of the rate in trainings of MEND, MALMEN and SERAC
with counterfact-12m and the embedded model, processor time of 1 thread. Where the kernels use
AVX-512 and reach 248 GFLOP/s, values reached 0.32 of that, covariance 0.41, keys 0.30 and scoring
0.48 (docs/plan.md has the run). Merging is in float64; its share is of that rate, which on
processors is half. Generation decodes token by token and is a guess, and so are attributions and
the networks of MEND, MALMEN and KE.
"""
CALL_SECONDS = {"ray": 0.03, "in_process": 0.005}
"""A call to a worker beyond its arithmetic: tokenising, sending, storing: 0.01 to 0.1 with Ray;
0.006 in one process, for the factors of 16 edits."""
START_SECONDS = {"ray": 15.0, "in_process": 1.0}
"""Starting Ray with two workers on a quiet machine took 14.7 to 17.7 s, imports mostly."""
LOAD_BYTES_PER_SECOND = 1e9
"""Weights from disk to memory, a checkpoint to disk."""
BYTES_PER_SECOND = 1e10
"""Of numbers that are gone through one by one, by one processor. That fits trainings of MEND and
MALMEN with the embedded model; optimisers, whose numbers stayed in the cache there, reached 3e10.
"""
DOUBLE_SHARE = 0.5
"""Of the rate in float32 on processors, that in float64."""
MERGE_THREADS = 2
"""Threads of the reducer that a merge makes use of."""
