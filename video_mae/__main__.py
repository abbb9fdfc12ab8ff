"""`python -m video_mae`, and what `deepspeed --module video_mae ...` starts."""

from video_mae.cli import main

if __name__ == "__main__":
    main()
