"use strict";
// Returns the function that makes the content of the panel: what each model thought before a token of the text.
const panelContent = (data) => {
  const make = (name, kind, ...children) => {
    const node = document.createElement(name);
    if (kind) node.className = kind;
    node.append(...children);
    return node;
  };
  const fixed = (x) => x.toFixed(2).replace("-0.00", "0.00").replace("-", "−");
  const signed = (x) => (x >= 0.005 ? "+" : "") + fixed(x);
  const percent = (p) => {
    const x = 100 * p;
    return (x >= 10 ? x.toFixed(1) : x >= 0.01 ? x.toFixed(2) : "< 0.01") + " %";
  };
  const chip = (index) => make("span", "chip", data.pieces[index]);

  const odds = (title, list) => {
    const column = make("div", "", make("h4", "", title));
    for (const [index, probability, isTrue] of list) {
      const bar = make("i");
      bar.style.width = 100 * probability + "%";
      column.append(make("div", isTrue ? "odds true" : "odds", chip(index), make("span", "", percent(probability)), bar));
    }
    return column;
  };

  const thoughtTable = (entry) => {
    const head = make("tr", "", make("th", "", "thought"), make("th", "", "reward"), make("th", "", "mixing weight"), make("th", "", "this token"));
    const table = make("table", "", head);
    entry.k.forEach(([nats, reward, weight, pieces], n) => {
      const name = n ? "sampled " + n : "likeliest words (greedy)";
      const words = make("td", "", make("small", "", name), ...pieces.map(chip));
      table.append(make("tr", "thought", words, make("td", "", signed(reward)), make("td", "", fixed(weight)), make("td", "", percent(Math.exp(-nats)))));
    });
    return table;
  };

  const context = (token) => {
    const before = [];
    for (let node = token.previousSibling; node && before.join("").length < 70; node = node.previousSibling) before.unshift(node.textContent);
    return make("div", "context", "… " + before.join("").replace(/\n/g, " "), make("b", "", data.pieces[data.tokens[token.dataset.i]]));
  };

  const verdict = (change) => {
    const times = Math.exp(Math.abs(change));
    const made = times >= 2
      ? times.toFixed(times >= 10 ? 0 : 1) + (change > 0 ? " times as likely." : " times less likely.")
      : (100 * Math.abs(Math.expm1(change))).toFixed(0) + (change > 0 ? " % likelier." : " % less likely.");
    return Math.abs(change) < data.levels[0] ? "The thought changed almost nothing here." : "The thought made this token " + made;
  };

  const thoughtsOf = (model, entry) => {
    const change = entry.b - entry.k[0][0];
    return [
      ...(data.models.length > 1 ? [make("h3", "model", model.name)] : []),
      make("div", "verdict", verdict(change)),
      make("div", "soft", "Loss " + entry.b.toFixed(3) + " nats without a thought, " + entry.k[0][0].toFixed(3) + " with the greedy one: " + signed(change) + "."),
      make("h3", "", "What the model thought"),
      thoughtTable(entry),
      make("h3", "", "Likeliest next tokens"),
      make("div", "pair", odds("without a thought", entry.p), odds("with the greedy thought", entry.q)),
    ];
  };

  return (token) => [
    make("h3", "", "Just before this token"),
    context(token),
    ...data.models.flatMap((model) => thoughtsOf(model, model.tokens[token.dataset.i])),
    make("div", "note", "Reward: nats gained over the next " + (data.ahead > 1 ? data.ahead + " tokens" : "token") + ". Mixing weight: how much the prediction after the thought counts. Last column: probability of this token."),
  ];
};
