"""The way of a sample, from a tar shard to a micro-batch.                                      [door to webdataset]

    shards.py      spec on the command line -> shards            location.py     paths, and URLs that hide credentials
    shard_file.py  a shard as a file, here or remote             remote.py       ranges behind URLs  [door to fsspec]
    tar_stream.py  one shard -> its members                      retry.py        what is tried again over a network
    scan.py        members -> where samples lie, checksums       checksum.py     xxh3
    index_file.py  the same, kept in a file                      shard_samples.py  the same, in memory
    salvage.py     a damaged shard and its index -> what is still as it was
    index_build.py every shard -> its samples                    shard_pool.py   many shards at once
    index.py       all shards -> ShardIndex, in the order of the keys
    check.py, repair.py   is a set sound, and new shards of what is; bad_samples.py   what was left out
    selection.py   ShardIndex -> which samples, with which labels: all of the next four
    key_list.py    a list that names them                        fraction.py     an exact, balanced, nested share
    imbalance.py   a long tail of class sizes                    label_noise.py  wrong labels on purpose
    order.py       (seed, stage, step, slot) -> which sample, in which epoch
    reader.py      sample id -> bytes                            range_cache.py  ranges of remote shards, kept here
    decode.py      bytes -> pixels, in bounded memory            images.py       crops, resizing, augmentation
    dataset.py     rows -> slots of a batch, or why not          bad_samples.py  what is said of those that fail
    fetch.py       requests -> pixels, by workers                loader.py       the stream of Batch of one student
    pipe.py        the output of a command as a shard
    stream.py      batches from shards without ranges            shard_stream.py one such shard
    sources/       folder, zip, list, data set -> samples        digits.py       scikit-learn's digits -> shards
    pack.py        samples -> shards, by way of pack_plan.py (which goes where), pack_image.py (bytes), pack_workers.py
    seeds.py       every random number of the above              atomic.py       whole files or none
    positional_file.py  a file that is read by place, for what lies behind URLs and in zips

Nothing in a shard is unpickled or executed.
"""
