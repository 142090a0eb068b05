// The types of `latzero/testing`.

/** A running server with a data directory and a port of its own. */
export interface Server {
  /** The directory of its data. */
  readonly dataDir: string
  /** Host and port. */
  readonly address: string
  /** The pin of its certificate, if it was started with `--tls`. */
  readonly pin: string | undefined
  /** The path of its Unix socket. */
  readonly socket: string
  /** The address for the app `appId`. */
  url(appId: string, pool?: string): string
  /** Kills the server, as a crash does. */
  kill(): Promise<void>
  /** Kills the server and starts it again, with the same data. */
  restart(): Promise<void>
  /** Kills the server and removes its data. */
  close(): Promise<void>
  /** As `close`. */
  [Symbol.asyncDispose](): Promise<void>
}

/** Starts a server; `args` are further arguments of `latzero start`. */
export function server(...args: string[]): Promise<Server>

/** The program `latzero`: `LATZERO_BIN`, else the package's own, else the one in `PATH`. */
export function findProgram(): string
