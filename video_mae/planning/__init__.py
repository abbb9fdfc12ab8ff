"""What a run takes, before it is paid for: `video-mae plan`."""
