"""This machine and this process: what a load asks of them, and what it holds back while it lasts."""
