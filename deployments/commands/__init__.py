"""What a terminal runs: `llava serve`, `demo`, `keys` and `top`. `llava page` is with its page."""
