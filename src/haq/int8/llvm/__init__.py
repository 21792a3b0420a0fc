"""The CPU's products, compiled by LLVM where they run, for the processor that is there.

Nothing imports llvmlite until a weight is packed for this backend; without it the next backend
takes over. A kernel rounds the tokens, multiplies and rescales in one call, on the threads that
torch has started anyway, and reads weights as they are, row by row.
"""
