"""Checkpoints where they are: s3://, gs://, az://, https://, through obstore, without a copy on the disk.

Of a checkpoint under a URL a folder is made that looks like one on the disk: what is small is there whole, and each
shard is a sparse file of its length with its real header. Everything above `Transport` reads that folder; `Transport`
tells the engine which files stand for remote objects, and it asks for ranges of those. Holes are never read.

    with opened("s3://bucket/model") as folder:
        checkpoint = open_checkpoint(folder)
"""
