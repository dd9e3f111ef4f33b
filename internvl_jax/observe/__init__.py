"""What a run shows and writes: metrics, progress, where the time went, profiles.

writer      metrics.jsonl always, TensorBoard and W&B as extras; resumed runs repeat no point
progress    the line in the terminal
throughput  MFU, and a ledger of seconds by kind that survives restarts (goodput)
profile     a profiler window on request
"""
