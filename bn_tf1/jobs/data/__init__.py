"""Image data sets: files checked to the last byte, and pipelines that resume at any step.

datasets          pipelines that resume at any step
idx_and_cifar     IDX (MNIST) and CIFAR files, checked to the last byte
image_folders     <class>/*.jpg
record_shards     TFRecords, read
shard_writer      TFRecords, made of an image folder
encoded_images    JPEG and PNG: checked, decoded, augmented
streamed          what does not fit in memory
array_batches     each example once, as arrays
"""
