// Whether a completion has the form that is asked for, and what its answer is. No regular expression runs over the
// model's text but one that the run's own settings give: scanning for tags takes linear time whatever the text is.

/**
 * The answer, or `null` when the form is not kept.
 * @typedef {(completion: string) => string | null} Form
 */

/** @type {Form} `<think>…</think><answer>…</answer>`, each tag once, nothing else around them. */
export function thinkAnswer(completion) {
  const text = completion.trim();
  if (!text.startsWith("<think>") || !text.endsWith("</answer>")) return null;
  return parts(text, "<think>".length);
}

/** @type {Form} The same where the chat template has opened `<think>` already. */
export function openThinkAnswer(completion) {
  const text = completion.trim();
  if (text.includes("<think>") || !text.endsWith("</answer>")) return null;
  return parts(text, 0);
}

/** @type {Form} Exactly one `<answer>…</answer>`, anything around it. */
export function answerOnly(completion) {
  return onlyOne(completion, "<answer>", "</answer>");
}

/**
 * A regular expression that has to match somewhere; its group `answer`, or its first one, is the answer.
 * @param {string} pattern
 * @returns {Form}
 */
export function matching(pattern) {
  const expression = new RegExp(pattern, "su");
  return (completion) => {
    const found = expression.exec(completion);
    return found === null ? null : (found.groups?.answer ?? found[1] ?? "");
  };
}

/**
 * `…</think> <answer>…</answer>` from `start`, each tag once.
 * @param {string} text
 * @param {number} start
 */
function parts(text, start) {
  const thought = text.indexOf("</think>", start);
  if (thought < 0 || text.indexOf("</think>", thought + 1) >= 0 || text.indexOf("<think>", start) >= 0) return null;
  const rest = text.slice(thought + "</think>".length).trimStart();
  if (!rest.startsWith("<answer>") || text.slice(start, thought).trim() === "") return null;
  return onlyOne(rest, "<answer>", "</answer>");
}

/**
 * What stands between the only `open` and the only `close`.
 * @param {string} text
 * @param {string} open
 * @param {string} close
 */
function onlyOne(text, open, close) {
  const from = text.indexOf(open);
  const to = text.indexOf(close);
  if (from < 0 || to < from || text.indexOf(open, from + 1) >= 0 || text.indexOf(close, to + 1) >= 0) return null;
  const answer = text.slice(from + open.length, to).trim();
  return answer === "" ? null : answer;
}
