// Tells the mean of a frame, and how noisy it is.

import { connect } from 'latzero'

const app = await connect('latzero://describe?pool=frames')

await app.serve('describe', (frame) => frame.read((pixels) => {
  let sum = 0
  let steps = 0
  for (let i = 1; i < pixels.length; i++) {
    sum += pixels[i]
    // In a smooth picture neighbours are alike, so what differs is noise.
    steps += (pixels[i] - pixels[i - 1]) ** 2
  }
  return { mean: sum / pixels.length, noise: Math.sqrt(steps / pixels.length / 2) }
}))

console.log('ready')
