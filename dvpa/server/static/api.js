/* The server's API: requests with the key, errors in words, server-sent events. */

const KEY = "dvpa-api-key";

/** A request that failed. `message` can be shown as it is; status 0: no answer at all. */
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.name = "ApiError";
    this.status = status;
  }
}

let memory = ""; // where the browser forbids storage

/** The API key of this tab, "" if there is none. */
export function getKey() {
  try {
    return sessionStorage.getItem(KEY) ?? memory;
  } catch {
    return memory;
  }
}

/** Keep a key for this tab, or forget it with "". */
export function setKey(key) {
  memory = key;
  try {
    if (key) sessionStorage.setItem(KEY, key);
    else sessionStorage.removeItem(KEY);
  } catch {
    // Kept in memory only.
  }
}

/** GET `path`, or POST `body` as JSON. Returns the response; raises ApiError if it is not a 2xx. */
export async function call(path, { body, signal } = {}) {
  const headers = {};
  if (getKey()) headers.authorization = `Bearer ${getKey()}`;
  if (body) headers["content-type"] = "application/json";
  const method = body ? "POST" : "GET";
  let response;
  try {
    response = await fetch(path, { method, headers, signal, cache: "no-store", body: body && JSON.stringify(body) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server does not answer. It may be down or restarting.");
  }
  if (response.ok) return response;
  let said = "";
  try {
    said = String((await response.json()).error.message);
  } catch {
    // Not the server's own error: a proxy's page, perhaps.
  }
  throw new ApiError(response.status, inWords(response.status, said, response.headers.get("retry-after")));
}

function inWords(status, said, retryAfter) {
  const again = /^\d+$/.test(retryAfter ?? "") ? `Try again in ${retryAfter} s.` : "Try again in a moment.";
  const quoted = said && ` The server says: ${said}`;
  if (status === 401) return getKey() ? "The server refuses this API key." : "This server asks for an API key.";
  if (status === 413) return `The prompt is larger than the server accepts.${quoted}`;
  if (status === 429) return `The server is full: its queue is at its bound. ${again}`;
  if (status === 503) return `The server cannot answer now: ${said.replace(/; try again later$/, "") || "it is loading or draining"}. ${again}`;
  if (status >= 500) return `The server failed (${status}).${quoted}`;
  return said || `The server refuses the request (${status}).`;
}

/** The JSON of every `data:` event up to `[DONE]`. Raises ApiError for an error event or a cut. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new ApiError(0, "The connection was cut before the answer was complete.");
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue; // comments, event names, the empty line between
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new ApiError(event.error.code ?? 500, String(event.error.message));
        yield event;
      }
    }
  } catch (error) {
    if (error.name !== "TypeError") throw error; // fetch's word for a lost connection
    throw new ApiError(0, "The connection was cut before the answer was complete.");
  } finally {
    reader.cancel().catch(() => {});
  }
}
