"""What pyint8 does when it is asked: one verb a file, which returns data and prints nothing."""
