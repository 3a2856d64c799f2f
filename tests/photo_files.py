"""Files of photos with EXIF data."""

import io

from PIL import ExifTags, Image

Tags = tuple[dict, dict, dict]  # of the photo, of how it was taken, of its position

PIXEL: Tags = (
    {ExifTags.Base.Make: "Google", ExifTags.Base.Model: "Pixel 8", ExifTags.Base.Orientation: 1},
    {
        ExifTags.Base.DateTimeOriginal: "2024:05:01 18:30:05",
        ExifTags.Base.DateTimeDigitized: "2024:06:02 00:00:00",
        ExifTags.Base.LensModel: "Pixel 8 back camera",
    },
    {1: "N", 2: (47.0, 25.0, 15.0), 3: "W", 4: (122.0, 30.0, 18.0)},
)
NIKON: Tags = ({ExifTags.Base.Make: "NIKON"}, {ExifTags.Base.DateTimeDigitized: "2023:12:31 23:59:59"}, {})


def photo(tags: Tags, kind: str = "JPEG", *, size: tuple[int, int] = (12, 10), color: str = "navy") -> bytes:
    exif = Image.Exif()
    exif.update(tags[0])
    for ifd, values in ((ExifTags.IFD.Exif, tags[1]), (ExifTags.IFD.GPSInfo, tags[2])):
        exif.get_ifd(ifd).update(values)
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, kind, exif=exif)
    return file.getvalue()
