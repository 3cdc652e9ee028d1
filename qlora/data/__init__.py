"""From files to micro-batches: `source` reads conversations (`files` has the rows, `formats` what they mean), `chat`
makes tokens and a loss mask, `packing` batches.

`show` prints all of that for a person to judge before a run is started.
"""
