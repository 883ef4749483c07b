"""Encoded images, JPEG and PNG: checked by their bytes, decoded and augmented by TensorFlow.

Whether an image can be decoded is seen from its bytes before TensorFlow gets them, since
its decoders end a whole batch without saying which image it was. What they do not mind
(flipped bits inside of a JPEG) is decoded to what it is.

Contract: always three channels, float32 in [0, 1]. Without augmentation an image is
resized to the size of the network; for photographs, training takes a crop of random area
and aspect, mirrored at random, and evaluation the centre. All randomness is a function of
a seed.

Source: the crop of random area and aspect is that of Szegedy et al., "Going Deeper with
Convolutions", 2014 (arXiv:1409.4842), section 6.
"""

from __future__ import annotations

import struct
import zlib
from typing import Sequence

import numpy as np
import tensorflow.compat.v1 as tf

EXTENSIONS = (".jpg", ".jpeg", ".png")

_JPEG = b"\xff\xd8\xff"
_PNG = b"\x89PNG\r\n\x1a\n"
# Start-of-frame markers: those of Huffman coding, sequential and progressive, that the
# decoder knows.
_FRAMES = (0xC0, 0xC1, 0xC2)
_OTHER_FRAMES = (0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)
_START_OF_SCAN = 0xDA
_ORIENTATION = 0x0112  # a tag of EXIF; 1 is upright
_END = b"\xff\xd9"
_MAX_PIXELS = 1 << 28

# The share of the area, the ratio of the sides, and how often a crop is tried.
_AREA = (0.08, 1.0)
_ASPECT = (3 / 4, 4 / 3)
_ATTEMPTS = 10
# The centre that evaluation sees: 224 of 256 pixels.
_CENTRE = 224 / 256


def why_not_decodable(encoded: bytes) -> str | None:
    """What keeps `encoded` from being an image, in words; None if nothing does."""
    if not encoded:
        return "it is empty"
    if encoded.startswith(_JPEG):
        return _jpeg_problem(encoded)
    if encoded.startswith(_PNG):
        return _png_problem(encoded)
    return f"it begins with {encoded[:8]!r}, and is neither a JPEG nor a PNG"


def is_stored_rotated(encoded: bytes) -> bool:
    """Whether a JPEG says that it must be turned to be looked at (EXIF orientation).

    TensorFlow's decoders do not turn it.
    """
    # In the first segment of a photograph: where it is further on, nobody is told.
    start = encoded.find(b"Exif\0\0", 0, 1 << 12) + 6
    order = {b"II": "<", b"MM": ">"}.get(encoded[start : start + 2])
    if not encoded.startswith(_JPEG) or start < 6 or order is None:
        return False
    try:
        (first,) = struct.unpack_from(order + "I", encoded, start + 4)
        (count,) = struct.unpack_from(order + "H", encoded, start + first)
        for i in range(count):
            entry = start + first + 2 + 12 * i
            tag, _, _, value = struct.unpack_from(order + "HHIH", encoded, entry)
            if tag == _ORIENTATION:
                return value > 1
    except struct.error:  # cut off, or no numbers where they should be
        pass
    return False


def _jpeg_problem(encoded):
    position = 2
    while position + 4 <= len(encoded):
        if encoded[position] != 0xFF:
            return f"it has no marker at byte {position}, where a JPEG must have one"
        marker = encoded[position + 1]
        if marker == 0xFF:  # padding
            position += 1
            continue
        if marker in _OTHER_FRAMES:
            return (
                "it is a lossless or arithmetic JPEG, which TensorFlow does not decode"
            )
        if marker in _FRAMES:
            # Before TensorFlow: a file of some bytes can claim a picture of 12 GB.
            height, width = struct.unpack(">HH", encoded[position + 5 : position + 9])
            problem = _size_problem(height, width)
            if problem:
                return problem
        if marker == _START_OF_SCAN:
            # Some cameras write a few bytes behind the end.
            is_whole = _END in encoded[-4096:]
            return None if is_whole else "it is a JPEG that was cut off"
        position += 2 + int.from_bytes(encoded[position + 2 : position + 4], "big")
    return "it is a JPEG that was cut off"


def _png_problem(encoded):
    height = width = 0
    position = len(_PNG)
    while position + 12 <= len(encoded):
        length = int.from_bytes(encoded[position : position + 4], "big")
        chunk = encoded[position + 4 : position + 8 + length]
        checksum = encoded[position + 8 + length : position + 12 + length]
        if len(checksum) < 4:
            break
        if zlib.crc32(chunk) != int.from_bytes(checksum, "big"):
            return f"it is a PNG whose part {chunk[:4]!r} is damaged"
        if chunk.startswith(b"IHDR"):
            width, height = struct.unpack(">II", chunk[4:12])
        if chunk.startswith(b"IEND"):
            return _size_problem(height, width)
        position += 12 + length
    return "it is a PNG that was cut off"


def _size_problem(height, width):
    if not height or not width:
        return f"it has {width} x {height} pixels"
    if height * width > _MAX_PIXELS:
        return f"it has {width} x {height} pixels, more than {_MAX_PIXELS} in all"
    return None


def decode_resized(encoded: tf.Tensor, image_size: int) -> tf.Tensor:
    """An image, resized to the size of the network.

    Args:
        encoded: scalar string tensor, a JPEG or PNG.
        image_size: height and width of the result, in pixels.

    Returns:
        float32 [image_size, image_size, 3] in [0, 1].
    """
    return _scaled(_resized(_decoded(encoded), image_size), image_size)


def decode_shifted(
    encoded: tf.Tensor, image_size: int, seed: tf.Tensor, *, padding: int
) -> tf.Tensor:
    """As `decode_resized`, then moved by up to `padding` pixels, mirrored at random.

    Where the image has moved away from, the result is black.

    Args:
        seed: int64 [2].
    """
    image = _decoded(encoded)
    draws = random_integers([3], seed)
    down, right = tf.unstack(draws[:2] % (2 * padding + 1) - padding)

    def moved(pixels):
        return _mirrored(_moved(pixels, down, right, image_size), draws[2] % 2 > 0)

    # Bytes are moved faster than floats: where nothing is to be resized, before the cast.
    image = tf.cond(
        tf.reduce_all(tf.equal(tf.shape(image)[:2], image_size)),
        lambda: tf.cast(moved(image), tf.float32),
        lambda: moved(_resized(image, image_size)),
    )
    return _scaled(image, image_size)


def decode_centre(encoded: tf.Tensor, image_size: int) -> tf.Tensor:
    """The largest square in the middle, less an eighth; as `decode_resized`."""
    image = _decoded(encoded)
    height, width = tf.unstack(tf.shape(image)[:2])
    side = tf.cast(tf.minimum(height, width), tf.float32) * _CENTRE
    side = tf.maximum(tf.cast(side, tf.int32), 1)
    top, left = (height - side) // 2, (width - side) // 2
    image = image[top : top + side, left : left + side]
    return _scaled(_resized(image, image_size), image_size)


def decode_random_crop(
    encoded: tf.Tensor, image_size: int, seed: tf.Tensor
) -> tf.Tensor:
    """A crop of random area and aspect, mirrored at random; as `decode_resized`.

    Of a JPEG only the crop is decoded.

    Args:
        seed: int64 [2].
    """
    # By its bytes: a PNG may be named .jpg.
    is_jpeg = tf.equal(tf.strings.substr(encoded, 0, 3), _JPEG)
    draws = tf.random.stateless_uniform([4 * _ATTEMPTS + 1], seed=seed)
    draws, mirror = tf.reshape(draws[1:], [4, _ATTEMPTS]), draws[0]

    def of_jpeg():
        shape = tf.image.extract_jpeg_shape(encoded)
        window = _random_window(shape[0], shape[1], draws)
        return tf.image.decode_and_crop_jpeg(encoded, window, channels=3)

    def of_other():
        image = _decoded(encoded)
        shape = tf.shape(image)
        top, left, height, width = tf.unstack(_random_window(shape[0], shape[1], draws))
        return image[top : top + height, left : left + width]

    crop = tf.cond(is_jpeg, of_jpeg, of_other)
    crop = _mirrored(crop, mirror < 0.5)
    return _scaled(_resized(crop, image_size), image_size)


def random_integers(shape: Sequence[int], seed: tf.Tensor) -> tf.Tensor:
    """int32 in [0, 2**31 - 1), a function of `seed`, int64 [2], on every TensorFlow."""
    # No floats, of which there are 2**23 only: ranks that tie have no order.
    return tf.random.stateless_uniform(
        shape, seed=seed, minval=0, maxval=2**31 - 1, dtype=tf.int32
    )


def _decoded(encoded):
    """uint8 [height, width, 3]; TensorFlow's op for PNG takes JPEG, too."""
    image = tf.image.decode_png(encoded, channels=3)
    image.set_shape([None, None, 3])
    return image


def _mirrored(image, is_mirrored):
    return tf.cond(is_mirrored, lambda: tf.reverse(image, [1]), lambda: image)


def _moved(image, down, right, size):
    """`image` [size, size, 3], `down` and `right` pixels further, black where it was."""
    # Joined with black and not padded, as rows of numbers: tf.pad takes ten times as long
    # on TensorFlow 1.15.
    kept = tf.slice(
        tf.reshape(image, [size, size * 3]),
        tf.stack([tf.maximum(-down, 0), 3 * tf.maximum(-right, 0)]),
        tf.stack([size - tf.abs(down), 3 * (size - tf.abs(right))]),
    )
    height = tf.shape(kept)[0]
    left, wide = 3 * tf.maximum(right, 0), 3 * tf.maximum(-right, 0)
    kept = tf.concat([_black(height, left, kept), kept, _black(height, wide, kept)], 1)
    above, below = tf.maximum(down, 0), tf.maximum(-down, 0)
    rows = [_black(above, size * 3, kept), kept, _black(below, size * 3, kept)]
    return tf.reshape(tf.concat(rows, 0), [size, size, 3])


def _black(height, width, like):
    return tf.zeros(tf.stack([height, width]), like.dtype)


def _random_window(height, width, draws):
    """[top, left, height, width], int32: the first of some attempts that fits, or all."""
    # Not tf.image.sample_distorted_bounding_box, whose seed is the graph's: a run that is
    # resumed would see other crops.
    area = tf.cast(height, tf.float32) * tf.cast(width, tf.float32)
    target = area * (_AREA[0] + draws[0] * (_AREA[1] - _AREA[0]))
    low, high = np.log(_ASPECT).astype(np.float32)
    aspect = tf.exp(low + draws[1] * (high - low))
    heights = tf.cast(tf.round(tf.sqrt(target / aspect)), tf.int32)
    widths = tf.cast(tf.round(tf.sqrt(target * aspect)), tf.int32)
    fits = (heights >= 1) & (widths >= 1) & (heights <= height) & (widths <= width)
    # An attempt that fits always is the last: the whole image.
    heights = tf.concat([heights, [height]], 0)
    widths = tf.concat([widths, [width]], 0)
    first = tf.argmax(tf.cast(tf.concat([fits, [True]], 0), tf.int32))
    crop_height, crop_width = heights[first], widths[first]
    draw = tf.pad(draws, [[0, 0], [0, 1]])[2:, first]
    room = tf.cast(tf.stack([height - crop_height, width - crop_width]) + 1, tf.float32)
    corner = tf.minimum(tf.cast(draw * room, tf.int32), tf.cast(room, tf.int32) - 1)
    return tf.stack([corner[0], corner[1], crop_height, crop_width])


def _resized(image, image_size):
    """float32 [image_size, image_size, 3], smoothed where it shrinks: no pattern appears."""
    size = tf.constant([image_size, image_size])

    def enlarged():
        # What `smoothed` gives, in a ninth of its time; of the same size, a cast.
        return tf.raw_ops.ResizeBilinear(
            images=image[tf.newaxis], size=size, half_pixel_centers=True
        )

    def smoothed():
        scale = tf.cast(size, tf.float32) / tf.cast(tf.shape(image)[:2], tf.float32)
        return tf.raw_ops.ScaleAndTranslate(
            images=tf.cast(image, tf.float32)[tf.newaxis],
            size=size,
            scale=scale,
            translation=[0.0, 0.0],
            kernel_type="triangle",
            antialias=True,
        )

    shrinks = tf.reduce_any(tf.shape(image)[:2] > size)
    return tf.cond(shrinks, smoothed, enlarged)[0]


def _scaled(image, image_size):
    image.set_shape([image_size, image_size, 3])
    return image * np.float32(1 / 255)
