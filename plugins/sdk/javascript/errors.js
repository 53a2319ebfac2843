// From an exception to the one line that the run's log shows.

export class SampleError extends Error {}

const MESSAGE_CHARS_MAX = 1000;
/** Files of the SDK and of the build, which an author does not want to see. */
const OURS = /\/(cosmos-plugin|bridge|host|definition|errors|settings|entry|lend)\.js:\d+/;

export function explain(error) {
  if (!(error instanceof Error)) return cut(String(error));
  const message = cut(error.message);
  if (error instanceof SampleError) return message;
  const place = where(error.stack);
  return `${error.name}: ${message}${place && ` (${place})`}`;
}

function cut(text) {
  return text.length > MESSAGE_CHARS_MAX ? `${text.slice(0, MESSAGE_CHARS_MAX)}…` : text;
}

/** `app.js:3 in \`score\`` of the innermost frame in the author's own files, or an empty text. */
function where(stack) {
  for (const line of (stack ?? "").split("\n")) {
    const frame = /^\s*at (?:(.*?) )?\(?(?:file:\/\/)?([^()\s]+\.m?js):(\d+)/.exec(line);
    if (frame && !OURS.test(line)) {
      const [, name, file, number] = frame;
      const at = `${file.replace(/^.*\//, "")}:${number}`;
      return name && !name.startsWith("<") ? `${at} in \`${name}\`` : at;
    }
  }
  return "";
}
