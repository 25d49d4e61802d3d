// Character alignment of two texts, as the edit distance counts it.

const ALIGN_MOST = 1200; // characters; the table has as many cells as the product of the lengths

/** [[left, right], ...]: pairs of characters, null where one side has none; null where a text is too long. */
function alignment(left, right) {
  const a = Array.from(left), b = Array.from(right);
  if (a.length > ALIGN_MOST || b.length > ALIGN_MOST) return null;
  const width = b.length + 1, cost = new Uint16Array((a.length + 1) * width);
  for (let j = 0; j <= b.length; j++) cost[j] = j;
  for (let i = 1; i <= a.length; i++) {
    cost[i * width] = i;
    for (let j = 1; j <= b.length; j++) {
      const swap = cost[(i - 1) * width + j - 1] + (a[i - 1] === b[j - 1] ? 0 : 1);
      cost[i * width + j] = Math.min(swap, cost[(i - 1) * width + j] + 1, cost[i * width + j - 1] + 1);
    }
  }
  const pairs = [];
  let i = a.length, j = b.length;
  while (i || j) {
    const here = cost[i * width + j];
    if (i && j && here === cost[(i - 1) * width + j - 1] + (a[i - 1] === b[j - 1] ? 0 : 1)) pairs.push([a[--i], b[--j]]);
    else if (i && here === cost[(i - 1) * width + j] + 1) pairs.push([a[--i], null]);
    else pairs.push([null, b[--j]]);
  }
  return pairs.reverse();
}

const shownCharacter = (c) => (c === null ? "\u00b7" : c === "\n" ? "\u21b5" : c === "\t" ? "\u2192" : visible(c));

/** Two lines of equal length a block, the student's above the teacher's, differences marked. */
function alignedBlocks(student, teacher, columns) {
  const pairs = alignment(student, teacher);
  if (!pairs) return [el("p", { class: "plain" }, teacher)];
  const blocks = [];
  for (let start = 0; start < Math.max(1, pairs.length); start += columns) {
    const part = pairs.slice(start, start + columns);
    blocks.push(el("div", { class: "block" }, line(part, 0), line(part, 1)));
  }
  return blocks;
}

/** One line; runs of equal kind are one element. */
function line(pairs, side) {
  const node = el("div", { class: side ? "teacher" : "student" });
  let kind = null, text = "";
  const flush = () => {
    if (text) node.append(kind === "same" ? text : el("mark", { class: kind }, text));
    text = "";
  };
  for (const pair of pairs) {
    const now = pair[0] === pair[1] ? "same" : pair[side] === null ? "gap" : "differs";
    if (now !== kind) flush();
    kind = now;
    text += shownCharacter(pair[side]);
  }
  flush();
  return node;
}
