"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const panel = document.getElementById("panel");
  const tokens = Array.from(document.querySelectorAll(".t[data-i]"));
  if (!tokens.length) return;
  let pinned = null;

  const make = (name, kind, ...children) => {
    const node = document.createElement(name);
    if (kind) node.className = kind;
    node.append(...children);
    return node;
  };
  const minus = (text) => text.replace("-", "−");
  const signed = (x) => {
    const text = x.toFixed(2).replace("-0.00", "0.00");
    return (Number(text) > 0 ? "+" : "") + minus(text);
  };
  const percent = (p) => {
    const x = 100 * p;
    return (x >= 10 ? x.toFixed(1) : x >= 0.01 ? x.toFixed(2) : "< 0.01") + " %";
  };
  const chip = (index) => make("span", "chip", data.pieces[index]);
  const mean = (list) => list.reduce((a, b) => a + b, 0) / list.length;
  const gain = (entry, mode) => {
    const several = entry.k.slice(1).map((thought) => thought[0]);
    return entry.b - (mode === "sampled" && several.length ? mean(several) : entry.k[0][0]);
  };
  const shade = (x) => {
    const level = data.levels.filter((edge) => Math.abs(x) >= edge).length;
    return level ? (x > 0 ? "g" : "l") + level : "";
  };

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
      table.append(make("tr", "thought", words, make("td", "", signed(reward)), make("td", "", minus(weight.toFixed(2))), make("td", "", percent(Math.exp(-nats)))));
    });
    return table;
  };

  const context = (token) => {
    const before = [];
    for (let node = token.previousSibling; node && before.join("").length < 70; node = node.previousSibling) before.unshift(node.textContent);
    return make("div", "context", "… " + before.join("").replace(/\n/g, " "), make("b", "", data.pieces[data.tokens[token.dataset.i].i]));
  };

  const show = (token) => {
    const entry = data.tokens[token.dataset.i];
    const change = entry.b - entry.k[0][0];
    const times = Math.exp(Math.abs(change));
    const made = times >= 2
      ? times.toFixed(times >= 10 ? 0 : 1) + (change > 0 ? " times as likely." : " times less likely.")
      : (100 * Math.abs(Math.expm1(change))).toFixed(0) + (change > 0 ? " % likelier." : " % less likely.");
    const verdict = Math.abs(change) < data.levels[0] ? "The thought changed almost nothing here." : "The thought made this token " + made;
    panel.replaceChildren(
      make("h3", "", "Just before this token"),
      context(token),
      make("div", "verdict", verdict),
      make("div", "soft", "Loss " + entry.b.toFixed(3) + " nats without a thought, " + entry.k[0][0].toFixed(3) + " with the greedy one: " + signed(change) + "."),
      make("h3", "", "What the model thought"),
      thoughtTable(entry),
      make("div", "note", "Reward: nats gained over the next " + (data.ahead > 1 ? data.ahead + " tokens" : "token") + ". Mixing weight: how much the prediction after the thought counts. Last column: probability of this token."),
      make("h3", "", "Likeliest next tokens"),
      make("div", "pair", odds("without a thought", entry.p), odds("with the greedy thought", entry.q)),
    );
  };

  const pin = (token) => {
    if (pinned) pinned.classList.remove("pinned");
    pinned = pinned === token ? null : token;
    if (pinned) pinned.classList.add("pinned");
  };
  const tokenOf = (event) => event.target.closest(".t[data-i]");
  const texts = document.getElementById("texts");
  texts.addEventListener("pointerover", (event) => {
    const token = tokenOf(event);
    if (token && !pinned) show(token);
  });
  texts.addEventListener("focusin", (event) => {
    const token = tokenOf(event);
    if (!token) return;
    document.querySelectorAll('.t[tabindex="0"]').forEach((other) => { other.tabIndex = -1; });
    token.tabIndex = 0;
    if (!pinned) show(token);
  });
  texts.addEventListener("click", (event) => {
    const token = tokenOf(event);
    if (!token) return;
    pin(token);
    show(token);
  });
  texts.addEventListener("keydown", (event) => {
    const token = tokenOf(event);
    if (!token) return;
    const place = tokens.indexOf(token);
    const target = { ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: tokens.length - 1 }[event.key];
    if (target !== undefined && tokens[target]) {
      event.preventDefault();
      if (pinned) pin(pinned);
      tokens[target].focus();
    } else if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      pin(token);
      show(token);
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && pinned) pin(pinned);
  });
  document.querySelectorAll("button[data-jump]").forEach((button) => {
    button.addEventListener("click", () => {
      const token = tokens[button.dataset.jump];
      if (pinned !== token) pin(token);
      show(token);
      token.focus({ preventScroll: true });
      token.scrollIntoView({ block: "center" });
    });
  });
  document.querySelectorAll('input[name="mode"]').forEach((input) => {
    input.addEventListener("change", () => {
      for (const token of tokens) {
        token.classList.remove("g1", "g2", "g3", "g4", "l1", "l2", "l3", "l4");
        const kind = shade(gain(data.tokens[token.dataset.i], input.value));
        if (kind) token.classList.add(kind);
      }
    });
  });
  tokens[0].tabIndex = 0;
  show(tokens[data.start]);
})();
