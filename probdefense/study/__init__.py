"""The command: what it trains, what it attacks with, the job, and what it prints."""
