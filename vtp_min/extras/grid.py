"""A contact sheet: rows of images, with a label beside each row."""
from PIL import Image, ImageDraw

GAP = 2             # white pixels after each image
MARGIN = 110        # width of the label column; 17 letters of PIL's font fit
LETTERS = 17


def image_grid(rows, labels=None, scale=1):
    """rows  lists of uint8 (H, W, 3) arrays; images may differ in size, and rows in length

    labels  a text for each row, in a margin at the left and cut to LETTERS; None: no margin
    scale   each pixel becomes scale x scale
    -> PIL.Image, white where there is no image
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
