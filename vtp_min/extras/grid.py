"""A contact sheet: rows of images, with a label next to each row."""
from PIL import Image, ImageDraw

GAP = 2             # pixels of white space after each image
MARGIN = 110        # width of the label column in pixels
LETTERS = 17        # characters of PIL's default font that fit into the column


def image_grid(rows, labels=None, scale=1):
    """Draw images in rows -> PIL.Image on a white background

    rows    list of rows; a row is a list of uint8 arrays (H, W, 3). The images may differ in size
            and the rows in length.
    labels  one string per row, drawn at the left and cut to LETTERS characters; None: no labels
    scale   integer factor by which images are enlarged, without interpolation
    """
    left = MARGIN if labels else 0
    widths = [sum(image.shape[1] * scale + GAP for image in row) for row in rows]
    heights = [max(image.shape[0] for image in row) * scale + GAP for row in rows]
    sheet = Image.new("RGB", (left + max(widths), sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    y = 0
    for i, row in enumerate(rows):
        if labels:
            draw.text((4, y + heights[i] // 2 - 6), labels[i][:LETTERS], fill="black")
        x = left
        for image in row:
            height, width, _ = image.shape
            tile = Image.fromarray(image).resize((width * scale, height * scale), Image.NEAREST)
            sheet.paste(tile, (x, y))
            x += tile.width + GAP
        y += heights[i]
    return sheet
