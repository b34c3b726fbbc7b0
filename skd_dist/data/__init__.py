"""The way of a sample, from a tar shard to a micro-batch.                                      [door to webdataset]

    shards.py      spec on the command line -> shard paths
    scan.py        one shard -> where its samples lie            index_file.py   the same, kept beside the shard
    index.py       all shards -> ShardIndex, in the order of the keys
    fraction.py    ShardIndex -> ids of an exact, balanced, nested share
    order.py       (seed, stage, step, slot) -> which sample, in which epoch
    reader.py      sample id -> bytes                            checksum.py     are they the bytes that were indexed?
    decode.py      bytes -> pixels, in bounded memory            images.py       crops, resizing, augmentation
    dataset.py     rows -> slots of a batch, or why not          bad_samples.py  what is said of those that fail
    fetch.py       requests -> pixels, by workers                loader.py       the stream of Batch of one student
    pack.py        images -> shards                              digits.py       scikit-learn's digits -> shards
    seeds.py       every random number of the above              atomic.py       whole files or none

Nothing in a shard is unpickled or executed. Local files only.
"""
