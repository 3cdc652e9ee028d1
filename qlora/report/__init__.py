"""What a run tells: `events` are emitted once and sent to every sink; `terminal`, `trackers` and the log are sinks."""
