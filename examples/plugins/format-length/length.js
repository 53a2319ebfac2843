// How long a completion is, and what that is worth.

const HIGH_SURROGATES = /[\ud800-\udbff]/g;

/**
 * Unicode characters, not UTF-16 units.
 * @param {string} text
 */
export const chars = (text) => text.length - (text.match(HIGH_SURROGATES)?.length ?? 0);

/**
 * 1 at the target, falling evenly to 0 at `tolerance` away from it.
 * @param {number} length
 * @param {number} target
 * @param {number} tolerance
 */
export const nearTarget = (length, target, tolerance) => Math.max(0, 1 - Math.abs(length - target) / tolerance);

/**
 * The soft overlong punishment of DAPO (arXiv:2503.14476, equation 13): 0 up to `max - soft`, falling evenly to -1 at
 * `max`, and -1 beyond.
 * @param {number} length
 * @param {number} max
 * @param {number} soft
 */
export function softOverlong(length, max, soft) {
  if (length <= max - soft) return 0;
  return length >= max ? -1 : (max - soft - length) / soft;
}
