// An HTTP front for `classifier.py`: each line of a request's body is a message to sort.
//
//   curl --data-binary 'Where is my parcel?' http://127.0.0.1:PORT/

import { createServer } from 'node:http'
import { text } from 'node:stream/consumers'
import { connect } from 'latzero'

const WORDS = 1024
const MESSAGES_MAX = 10_000

/** Counts the words of a message into its row; `classifier.py` has the same function. */
function count (message, row) {
  for (const word of message.toLowerCase().match(/[a-z]+/g) ?? []) {
    let hash = 2166136261
    for (const letter of word) hash = Math.imul(hash ^ letter.charCodeAt(0), 16777619) >>> 0
    row[hash % WORDS] += 1
  }
  const norm = Math.max(Math.hypot(...row), 1)
  row.forEach((value, i) => { row[i] = value / norm })
}

/** The topics of these messages. */
async function classify (messages) {
  const name = `messages-${number++}`
  const shape = [messages.length, WORDS]
  // The block goes with its last user: this function.
  const vectors = await app.block(name, {
    shape, dtype: 'f4', create: 'new', lifetime: 'attached'
  })
  try {
    await vectors.write((numbers) => {
      numbers.fill(0)
      messages.forEach((message, i) => {
        count(message, numbers.subarray(i * WORDS, (i + 1) * WORDS))
      })
    }, { keep: false })
    return await app.call('classify', { vectors }, { timeoutMs: 10_000 })
  } finally {
    vectors.close()
  }
}

let number = 0
const app = await connect('latzero://web?pool=support')

const server = createServer(async (request, response) => {
  const answer = (status, value) => {
    response.writeHead(status, { 'content-type': 'application/json' })
    response.end(JSON.stringify(value) + '\n')
  }
  try {
    const messages = (await text(request)).split('\n').filter((line) => line.trim() !== '')
    if (messages.length === 0 || messages.length > MESSAGES_MAX) {
      return answer(400, { error: `send 1 to ${MESSAGES_MAX} lines` })
    }
    answer(200, await classify(messages))
  } catch (error) {
    // `no_handler` while the classifier is not running.
    answer(503, { error: error.message, code: error.code })
  }
})
server.listen(Number(process.argv[2] ?? 0), '127.0.0.1', () => {
  console.log(`ready: http://127.0.0.1:${server.address().port}/`)
})
