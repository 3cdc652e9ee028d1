"""From files to micro-batches: `source` reads conversations, `chat` makes tokens and a loss mask, `packing` batches.

`show` prints all of that for a person to judge before a run is started.
"""
