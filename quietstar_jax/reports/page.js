(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const tokens = Array.from(document.querySelectorAll(".t[data-i]")); // tokens[i] has data-i = i
  if (!tokens.length) return;
  const [texts, panel, thoughts, find, helped, least, back, next, count] = ["texts", "panel", "thoughts", "find", "helped", "least", "back", "next", "count"].map((id) => document.getElementById(id));
  const contentOf = panelContent(data);
  const placeOf = (token) => Number(token.dataset.i);

  // The token in the panel. It has a ring; a pinned one stays there while the mouse moves.
  let shown = tokens[data.start];
  let pinned = false;
  let hits = []; // places of the tokens that the search and the filter leave
  const show = (token) => {
    shown.classList.remove("shown", "pinned");
    shown.tabIndex = -1;
    shown = token;
    shown.classList.add("shown");
    shown.classList.toggle("pinned", pinned);
    shown.tabIndex = 0;
    thoughts.replaceChildren(...contentOf(shown));
    tellCount();
  };
  const select = (token, pin) => {
    pinned = pin;
    panel.classList.remove("closed");
    show(token);
  };
  const reveal = (token) => {
    select(token, true);
    token.scrollIntoView({ block: "center" });
  };
  const close = () => {
    pinned = false;
    shown.classList.remove("pinned");
    if (panel.contains(document.activeElement)) shown.focus({ preventScroll: true });
    panel.classList.add("closed"); // visible only on narrow screens, where the panel covers the text
  };

  // The nearest token in the line below (way = 1) or above (way = -1).
  const inNextLine = (place, way) => {
    const middle = (token) => {
      const box = token.getClientRects()[0];
      return [box.left + box.width / 2, box.top + box.height / 2];
    };
    const sameLine = (a, b) => Math.abs(a - b) < 12; // pixels; a line has 34
    const [x, y] = middle(tokens[place]);
    let line, nearest, least = Infinity;
    for (let i = place + way; tokens[i]; i += way) {
      const [otherX, otherY] = middle(tokens[i]);
      if (line === undefined && sameLine(otherY, y)) continue;
      line ??= otherY;
      if (!sameLine(otherY, line)) break;
      if (Math.abs(otherX - x) < least) [nearest, least] = [i, Math.abs(otherX - x)];
    }
    return nearest;
  };

  // Search and filter.
  const gap = data.words ? " " : "";
  const plain = (pieces) => pieces.map((piece) => data.pieces[piece]).join(gap).toLowerCase().replaceAll("·", " ");
  const starts = []; // of each token in `text`
  let text = "";
  for (const piece of data.tokens) {
    starts.push(text.length);
    text += plain([piece]) + gap;
  }
  let thoughtTexts = null; // of each token, all of its thoughts; made by the first search
  const matching = (words) => {
    thoughtTexts ??= tokens.map((_, i) => data.models.flatMap((model) => model.tokens[i].k.map((thought) => plain(thought[3]))).join("\n"));
    const found = thoughtTexts.map((thought) => thought.includes(words));
    for (let at = text.indexOf(words), i = 0; at >= 0; at = text.indexOf(words, at + 1)) {
      while (starts[i + 1] <= at) i += 1;
      found[i] = true; // an occurrence is found at the token in which it begins
    }
    return found;
  };
  const sift = () => {
    const words = find.value.trim().toLowerCase().replaceAll("·", " ");
    const found = words && matching(words);
    hits = [];
    texts.classList.toggle("filtered", helped.checked);
    tokens.forEach((token, i) => {
      const left = !helped.checked || change(i) > Number(least.value);
      const hit = left && (!words || found[i]);
      token.classList.toggle("dim", !left);
      token.classList.toggle("hit", Boolean(words) && hit);
      if (hit && (words || helped.checked)) hits.push(i);
    });
    back.disabled = next.disabled = !hits.length;
    tellCount();
  };
  const tellCount = () => {
    const at = hits.indexOf(placeOf(shown));
    const active = find.value.trim() || helped.checked;
    count.textContent = !active ? "" : at < 0 ? hits.length + " found" : at + 1 + " of " + hits.length;
  };
  const step = (way) => {
    const others = way > 0 ? hits : hits.toReversed();
    const place = others.find((i) => way * (i - placeOf(shown)) > 0) ?? others[0];
    if (place !== undefined) reveal(tokens[place]);
  };

  // Colours.
  const choice = (name) => document.querySelector(`input[name="${name}"]:checked`)?.value;
  const mean = (list) => list.reduce((a, b) => a + b, 0) / list.length;
  let mode, which;
  const gain = (entry) => {
    const losses = entry.k.map((thought) => thought[0]);
    return entry.b - (mode === "sampled" ? mean(losses.slice(1)) : losses[0]);
  };
  const change = (i) => {
    const gains = data.models.map((model) => gain(model.tokens[i]));
    return which === "difference" ? gains[0] - gains[1] : gains[which ?? 0];
  };
  const shade = (x) => {
    const level = data.levels.filter((edge) => Math.abs(x) >= edge).length;
    return level ? (x > 0 ? "g" : "l") + level : "";
  };
  const colour = () => {
    [mode, which] = [choice("mode"), choice("model")];
    tokens.forEach((token, i) => {
      token.classList.remove("g1", "g2", "g3", "g4", "l1", "l2", "l3", "l4");
      const kind = shade(change(i));
      if (kind) token.classList.add(kind);
    });
    sift();
  };

  const tokenOf = (event) => event.target.closest(".t[data-i]");
  texts.addEventListener("pointerover", (event) => {
    const token = tokenOf(event);
    if (token && !pinned) show(token);
  });
  texts.addEventListener("click", (event) => {
    const token = tokenOf(event);
    if (token) select(token, token !== shown || !pinned);
  });
  texts.addEventListener("keydown", (event) => {
    const token = tokenOf(event);
    if (!token || event.altKey || event.ctrlKey || event.metaKey) return;
    const place = placeOf(token);
    const targets = { ArrowRight: place + 1, ArrowLeft: place - 1, ArrowDown: () => inNextLine(place, 1), ArrowUp: () => inNextLine(place, -1), Home: 0, End: tokens.length - 1 };
    const target = targets[event.key];
    const other = tokens[typeof target === "function" ? target() : target];
    if (other) {
      event.preventDefault();
      select(other, false);
      other.focus({ preventScroll: true });
      other.scrollIntoView({ block: "nearest" });
    } else if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      select(token, token !== shown || !pinned);
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !(event.target === find && find.value)) close(); // Escape empties a search field
  });
  document.getElementById("close").addEventListener("click", close);
  document.getElementById("tools").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.target.tagName !== "INPUT") return;
    event.preventDefault();
    step(event.shiftKey ? -1 : 1);
  });
  back.addEventListener("click", () => step(-1));
  next.addEventListener("click", () => step(1));
  find.addEventListener("input", sift);
  helped.addEventListener("change", sift);
  least.addEventListener("input", () => {
    helped.checked = true;
    sift();
  });
  document.querySelectorAll("button[data-jump]").forEach((button) => {
    button.addEventListener("click", () => {
      const token = tokens[button.dataset.jump];
      token.focus({ preventScroll: true });
      reveal(token);
    });
  });
  document.querySelectorAll('input[type="radio"]').forEach((input) => input.addEventListener("change", colour));
  show(shown);
  colour(); // a browser may have restored a choice
})();
