"""The way of a sample, from a tar shard to a micro-batch.                                      [door to webdataset]

    shards.py      spec on the command line -> shard paths
    scan.py        one shard -> where its samples lie            index_file.py   the same, kept beside the shard
    index.py       all shards -> ShardIndex, in the order of the keys
    fraction.py    ShardIndex -> ids of an exact, balanced, nested share
    order.py       (seed, stage, step, slot) -> which sample, in which epoch
    reader.py      sample id -> bytes                            images.py       bytes -> augmented image
    loader.py      all of it -> the stream of Batch of one student
    sources/       folder, zip, list, data set -> samples        digits.py       scikit-learn's digits -> shards
    pack.py        samples -> shards, by way of pack_plan.py (which goes where), pack_image.py (bytes), pack_workers.py
    seeds.py       every random number of the above              atomic.py       whole files or none

Nothing in a shard is unpickled or executed. Local files only. Left out for now: checksums of image bytes, remote
shards, a quarantine for bad samples, resuming inside a stage other than by its first step.
"""
