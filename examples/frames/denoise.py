"""Takes the noise out of frames, where they lie: in the block that came with the call."""

import latzero

app = latzero.connect("latzero://denoise?pool=frames")


@app.serve
def denoise(frame: latzero.Block, /) -> None:
    """Replaces each pixel by the mean of its 3 x 3 neighbourhood."""
    with frame.write() as a:  # `a` is the next version, and begins as the present one
        for axis in (0, 1):
            shifted = a.swapaxes(0, axis)
            sums = shifted[:-2] + shifted[1:-1] + shifted[2:]
            shifted[1:-1] = sums / 3


print("ready", flush=True)
app.wait()
