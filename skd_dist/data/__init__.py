"""The way of a sample, from a tar shard to a micro-batch.                                      [door to webdataset]

    shards.py      spec on the command line -> shards          location.py     paths, and URLs that hide credentials
    scan.py        one shard -> where its samples lie            index_file.py   the same, kept beside the shard
    index.py       all shards -> ShardIndex, in the order of the keys
    fraction.py    ShardIndex -> ids of an exact, balanced, nested share
    order.py       (seed, stage, step, slot) -> which sample, in which epoch
    reader.py      sample id -> bytes                            images.py       bytes -> augmented image
    shard_file.py  a shard from front to back, here or remote    remote.py       ranges behind URLs  [door to fsspec]
    retry.py       what is tried again over a network            range_cache.py  ranges kept on a local disk
    loader.py      all of it -> the stream of Batch of one student
    stream.py      the same from shards without ranges           shard_stream.py one such shard
    pack.py        images -> shards                              digits.py       scikit-learn's digits -> shards
    seeds.py       every random number of the above              atomic.py       whole files or none

Nothing in a shard is unpickled or executed. Left out for now: checksums of image bytes, indexes of remote shards, a
quarantine for bad samples, resuming inside a stage other than by its first step.
"""
