"""What people watch: metrics, phase times, files, progress, sentinels."""
