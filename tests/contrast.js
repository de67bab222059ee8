// Text of the page whose contrast is below AA: 4.5, or 3 for large text. Returns lines "ratio selector text".
(() => {
  const parse = text => {
    const numbers = text.match(/[\d.]+/g).map(Number);
    return text.startsWith("color(srgb") ? [numbers[0] * 255, numbers[1] * 255, numbers[2] * 255, numbers[3] ?? 1]
      : [numbers[0], numbers[1], numbers[2], numbers[3] ?? 1];
  };
  const over = (front, back) => [0, 1, 2].map(i => front[i] * front[3] + back[i] * (1 - front[3])).concat(1);
  const light = color => {
    const [r, g, b] = color.slice(0, 3).map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = node => {
    const layers = [];
    for (let at = node; at; at = at.parentElement) layers.push(parse(getComputedStyle(at).backgroundColor));
    return layers.reverse().reduce((back, front) => over(front, back), [255, 255, 255, 1]);
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const found = new Map();
  while (walker.nextNode()) {
    const text = walker.currentNode.textContent.trim(), node = walker.currentNode.parentElement;
    if (!text || ["SCRIPT", "STYLE", "TEMPLATE", "NOSCRIPT"].includes(node.nodeName)) continue;
    const box = node.getBoundingClientRect(), style = getComputedStyle(node);
    if (!box.width || !box.height || style.visibility === "hidden" || node.closest("svg, [hidden]")) continue;
    let shown = 1;
    for (let at = node; at; at = at.parentElement) shown *= Number(getComputedStyle(at).opacity);
    if (!shown) continue;  // appears on hovering
    const back = ground(node), front = parse(style.color);
    front[3] *= shown;
    const [a, b] = [light(over(front, back)), light(back)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05), size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    if (ratio < (large ? 3 : 4.5) - 0.005) {
      const name = node.nodeName.toLowerCase() + (node.className ? "." + String(node.className).split(" ").join(".") : "");
      const key = ratio.toFixed(2) + " " + name;
      if (!found.has(key)) found.set(key, key + " " + text.slice(0, 40));
    }
  }
  return [...found.values()].sort().join("\n");
})()
