"use strict";
// bzip2 (Seward 1996): block sort, move-to-front, Huffman. Input and output are Uint8Array; `length` is the output's.
function bunzip2(input, length) {
  const output = new Uint8Array(length);
  let at = 0, held = 0, buffer = 0, written = 0;
  const damaged = () => { throw new Error("the data in this page are damaged"); };

  function bits(n) { // n <= 24
    while (held < n) {
      if (at >= input.length) damaged();
      buffer = (buffer << 8) | input[at++];
      held += 8;
    }
    held -= n;
    return (buffer >>> held) & ((1 << n) - 1);
  }

  if (bits(24) !== 0x425a68) damaged(); // "BZh"
  const level = bits(8) - 48;
  if (level < 1 || level > 9) damaged();
  const capacity = 100000 * level;
  const sorted = new Uint32Array(capacity);

  for (;;) {
    const magic = [bits(24), bits(24)];
    bits(16); bits(16); // checksum
    if (magic[0] === 0x177245 && magic[1] === 0x385090) break; // end of stream
    if (magic[0] !== 0x314159 || magic[1] !== 0x265359 || bits(1)) damaged();
    block();
  }
  if (written !== length) damaged();
  return output;

  function block() {
    const origin = bits(24);
    const used = bits(16), front = new Uint8Array(256);
    let symbols = 0;
    for (let i = 0; i < 16; i++) {
      if (!(used & (0x8000 >> i))) continue;
      const row = bits(16);
      for (let j = 0; j < 16; j++) if (row & (0x8000 >> j)) front[symbols++] = 16 * i + j;
    }
    const tables = bits(3), selectors = new Uint8Array(bits(15));
    const recent = [0, 1, 2, 3, 4, 5];
    for (let i = 0; i < selectors.length; i++) {
      let j = 0;
      while (bits(1)) j++;
      recent.unshift(...recent.splice(j, 1));
      selectors[i] = recent[0];
    }
    const codes = [];
    for (let t = 0; t < tables; t++) codes.push(table(symbols + 2));

    // Huffman, run lengths and move-to-front together give the last column of the sorted block.
    const counts = new Uint32Array(257), end = symbols + 1;
    let n = 0, group = 0, left = 0, code = null, run = 0, weight = 1;
    for (;;) {
      if (left-- === 0) { code = codes[selectors[group++]]; left = 49; }
      let size = code.shortest, value = bits(size);
      while (value > code.limit[size]) { value = (value << 1) | bits(1); if (++size > 20) damaged(); }
      const symbol = code.order[value - code.base[size]];
      if (symbol <= 1) { run += weight << symbol; weight <<= 1; continue; }
      if (run) {
        if (n + run > capacity) damaged();
        counts[front[0] + 1] += run;
        sorted.fill(front[0], n, n += run);
        run = 0; weight = 1;
      }
      if (symbol === end) break;
      const place = symbol - 1, byte = front[place];
      front.copyWithin(1, 0, place);
      front[0] = byte;
      if (n >= capacity) damaged();
      sorted[n++] = byte;
      counts[byte + 1]++;
    }

    // Undo the sort: each byte keeps, in its upper bits, the place of its successor.
    for (let i = 0; i < 256; i++) counts[i + 1] += counts[i];
    for (let i = 0; i < n; i++) sorted[counts[sorted[i] & 255]++] |= i << 8;
    let next = sorted[origin] >>> 8, last = -1, same = 0;
    for (let i = 0; i < n; i++) {
      const entry = sorted[next], byte = entry & 255;
      next = entry >>> 8;
      if (same === 4) { // four alike are followed by how many more
        output.fill(last, written, written += byte);
        same = 0; last = -1;
        continue;
      }
      same = byte === last ? same + 1 : 1;
      last = byte;
      output[written++] = byte;
    }
  }

  function table(size) {
    const lengths = new Uint8Array(size);
    let length = bits(5);
    for (let i = 0; i < size; i++) {
      while (bits(1)) length += bits(1) ? -1 : 1;
      lengths[i] = length;
    }
    const shortest = Math.min(...lengths), longest = Math.max(...lengths);
    const order = [], limit = new Int32Array(22).fill(-1), base = new Int32Array(22);
    let value = 0;
    for (let l = shortest; l <= longest; l++) {
      base[l] = value - order.length;
      for (let i = 0; i < size; i++) if (lengths[i] === l) { order.push(i); value++; }
      limit[l] = value - 1;
      value <<= 1;
    }
    limit[21] = 0x7fffffff;
    return { shortest, order: Uint16Array.from(order), limit, base };
  }
}
