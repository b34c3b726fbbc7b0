"""What can be packed: each source becomes rows, and rows become samples with keys and numbered classes.

    files.py         folder or zip, read by position       layouts.py      image folders, masks beside, boxes.json
    table.py         CSV or Parquet list of files          [door to pyarrow]
    torchvision_set.py   a torchvision data set            [door to torchvision.datasets]
    huggingface.py   a Hugging Face data set               [door to datasets]
    rows.py          rows -> Source: keys, class numbers, splits

A source is opened for a while: its rows read when they are packed, in whatever process does that.
"""
