// The browser of answers: what is picked stands in the form, and in the
// address, so that a view can be linked. Texts enter the page as text only.
(() => {
  const source = document.getElementById('answers-data');
  if (!source) return;
  const {sets, names} = JSON.parse(source.textContent);
  const form = document.getElementById('view');
  const count = document.getElementById('count');
  const list = document.getElementById('rows');
  const more = document.getElementById('more');
  const field = form.elements;
  const BATCH = 25, ALL = '*', PREFIX = '#answers&';
  const KEYS = ['set', 'seed', 'a', 'b', 'metric', 'sort', 'q'];
  let shown = BATCH;

  const element = (tag, text = '', name = '') => {
    const made = document.createElement(tag);
    if (text) made.textContent = text;
    if (name) made.className = name;
    return made;
  };
  const current = () => sets[field.set.value] ?? sets[0];

  function fill(select, options, wanted, otherwise = 0) {
    select.replaceChildren(...options.map(([value, text]) => {
      const option = element('option', text);
      option.value = value;
      return option;
    }));
    select.value = wanted;
    if (select.selectedIndex < 0) select.selectedIndex = otherwise;
    select.closest('label').hidden = options.length < 2;
  }

  // Puts a state into the form: what it lacks, or cannot be, is the default.
  // At first the last model stands beside the first.
  function set(state) {
    const same = values => values.map(value => [value, value]);
    const known = sets.findIndex(one => one.name === state.set);
    fill(field.set, sets.map((one, i) => [i, one.name]), Math.max(0, known));
    const {seeds, models, metrics} = current();
    fill(field.seed, same(seeds), state.seed);
    fill(field.a, same(models), state.a, models.length - 1);
    const others = models.length < 2 ? [] : [[ALL, 'all models']];
    fill(field.b, [...same(models), ...others], state.b);
    fill(field.metric, metrics.map(m => [m, names[m] ?? m]), state.metric);
    field.sort.value = state.sort;
    if (field.sort.selectedIndex < 0) field.sort.selectedIndex = 0;
    field.q.value = state.q ?? '';
    field.diff.checked = state.diff !== '0';
    shown = Math.max(BATCH, parseInt(state.n) || 0);
  }

  function get() {
    const state = {};
    for (const key of KEYS) state[key] = field[key].value;
    state.set = current().name;
    if (!field.diff.checked) state.diff = '0';
    if (shown > BATCH) state.n = shown;
    return state;
  }

  const fromAddress = () => Object.fromEntries(
    new URLSearchParams(location.hash.slice(PREFIX.length)));

  // Words, and phrases in quotes; a row must have all of them.
  const terms = () => [...field.q.value.matchAll(/"([^"]+)"|[^\s"]+/g)].map(
    found => (found[1] ?? found[0]).toLowerCase());

  function render() {
    const {rows, models, metrics} = current();
    const a = field.a.value, b = field.b.value, metric = field.metric.value;
    const pair = b !== ALL && a !== b;
    const picked = b === ALL ? models : pair ? [a, b] : [a];
    for (const option of field.sort.options) {
      option.disabled = option.value.endsWith('ahead') && !pair ||
        option.value !== 'index' && !metrics.length;
    }
    if (field.sort.selectedOptions[0].disabled) field.sort.value = 'index';
    field.diff.closest('label').hidden = !pair;

    const score = (row, model) =>
      row.answers[field.seed.value]?.[model]?.scores[metric] ?? NaN;
    const gap = row => score(row, a) - score(row, b);
    const words = terms();
    const found = rows.filter(row => {
      const answers = row.answers[field.seed.value] ?? {};
      const given = picked.flatMap(model => answers[model]?.text ?? []);
      if (!given.length) return false;
      const text = [row.prompt, row.input, ...row.references, ...given]
        .join('\n').toLowerCase();
      return words.every(word => text.includes(word));
    });
    const [sign, by] = {
      'a-low': [1, row => score(row, a)],
      'a-high': [-1, row => score(row, a)],
      'a-ahead': [-1, gap],
      'b-ahead': [1, gap],
    }[field.sort.value] ?? [1, row => row.index];
    found.sort((x, y) =>
      isNaN(by(x)) - isNaN(by(y)) || sign * (by(x) - by(y)) || x.index - y.index);

    const slice = found.slice(0, shown);
    list.replaceChildren(...slice.map(
      row => card(row, picked, pair && field.diff.checked, gap(row), words)));
    count.textContent = found.length
      ? `${slice.length} of ${found.length}` +
        (found.length < rows.length ? ` that match, of ${rows.length}` : '')
      : 'No prompt has all of these words.';
    more.hidden = slice.length === found.length;
    highlight(words);
  }

  function card(row, picked, marks, gap, words) {
    const answers = row.answers[field.seed.value];
    const made = element('article', '', 'card');
    made.tabIndex = -1;
    const head = element('h3', `Prompt ${row.index + 1}`);
    if (!isNaN(gap) && picked.length === 2) {
      const text = `${gap > 0 ? '+' : gap < 0 ? '−' : ''}${
        Math.abs(gap).toFixed(1)}`;
      head.append(element('span', `A − B  ${text}`, 'score'));
    }
    made.append(head, text(row.prompt));
    if (row.input) made.append(context(row.input, words));
    if (row.references.length || row.gold !== undefined) {
      const given = element('div', '', 'reference');
      given.append(element('h4',
        row.references.length > 1 ? 'References' : 'Reference'));
      given.append(...row.references.map(reference => text(reference)));
      if (row.gold !== undefined) given.append(note(`expected: ${row.gold}`));
      made.append(given);
    }
    const parts = marks && answers[picked[0]] && answers[picked[1]]
      ? difference(answers[picked[0]].text, answers[picked[1]].text) : null;
    const columns = element('div', '', 'models');
    picked.forEach((model, i) => {
      const column = element('div');
      const letter = field.b.value !== ALL && picked.length > 1 ? 'AB'[i] : '';
      const title = element('h4');
      if (letter) title.append(element('span', letter, 'letter'));
      title.append(model);
      const answer = answers[model];
      const score = answer?.scores[field.metric.value];
      if (score !== undefined) {
        title.append(element('span', score.toFixed(1), 'score'));
      }
      column.append(title);
      if (!answer) column.append(element('p', '(none)', 'empty'));
      else if (parts) column.append(marked(parts[i], i ? 'ins' : 'del'));
      else column.append(text(answer.text));
      if (answer) column.append(note(about(answer)));
      columns.append(column);
    });
    made.append(columns);
    if (marks && !parts && picked.every(model => answers[model])) {
      made.append(note('too long to compare word by word'));
    }
    return made;
  }

  const note = text => element('p', text, 'note');

  function text(value) {
    value = value.replace(/^\n+|\n+$/g, '');
    return value.trim() ? element('p', value, 'text')
      : element('p', '(empty)', 'empty');
  }

  // A long text beside the prompt is folded, unless it was searched for.
  function context(value, words) {
    if (value.length < 400) return text(value);
    const made = element('details');
    const low = value.toLowerCase();
    made.open = words.some(word => low.includes(word));
    const size = value.length.toLocaleString('en');
    made.append(element('summary', `Input, ${size} characters`), text(value));
    return made;
  }

  function about(answer) {
    const parts = [];
    if ('extracted' in answer) parts.push(`read as: ${answer.extracted ?? '–'}`);
    for (const [metric, value] of Object.entries(answer.scores)) {
      if (metric !== field.metric.value) {
        parts.push(`${names[metric] ?? metric} ${value.toFixed(1)}`);
      }
    }
    if ('tokens' in answer) parts.push(`${answer.tokens} tokens`);
    if ('cut_at' in answer) {
      parts.push(`cut at ${JSON.stringify(answer.cut_at)}`);
    }
    return parts.join(' · ');
  }

  function marked(parts, tag) {
    if (!parts.length) return text('');
    const made = element('p', '', 'text');
    for (const [part, only] of parts) {
      made.append(only ? element(tag, part) : part);
    }
    return made;
  }

  // Words of two texts that are in no longest common subsequence: for each
  // text [part, whether only this text has it]. Null if that takes too long.
  function difference(a, b) {
    const WORDS = /\s+|[\p{scx=Han}\p{scx=Hira}\p{scx=Kana}]|[\p{L}\p{M}\p{N}_]+|./gsu;
    const trim = x => x.replace(/^\n+|\s+$/g, '').match(WORDS) ?? [];
    const texts = [trim(a), trim(b)];
    const isWord = part => /\S/.test(part);
    const [x, y] = texts.map(parts => parts.filter(isWord));
    if (x.length * y.length > 4e6) return null;
    const width = y.length + 1;
    const length = new Uint16Array((x.length + 1) * width);
    for (let i = x.length - 1; i >= 0; i--) {
      for (let j = y.length - 1; j >= 0; j--) {
        const at = i * width + j;
        length[at] = x[i] === y[j] ? length[at + width + 1] + 1
          : Math.max(length[at + width], length[at + 1]);
      }
    }
    const only = [x.map(() => true), y.map(() => true)];
    for (let i = 0, j = 0; i < x.length && j < y.length;) {
      if (x[i] === y[j]) only[0][i++] = only[1][j++] = false;
      else if (length[(i + 1) * width + j] >= length[i * width + j + 1]) i++;
      else j++;
    }
    return texts.map((parts, k) => {
      const joined = [];
      let word = 0;
      for (const part of parts) {
        // A space is marked between two words that are.
        const mark = isWord(part) ? only[k][word++]
          : word > 0 && only[k][word - 1] && only[k][word] === true;
        const last = joined.at(-1);
        if (last && last[1] === mark) last[0] += part;
        else joined.push([part, mark]);
      }
      return joined;
    });
  }

  // What was searched for, marked without touching the texts.
  function highlight(words) {
    if (!window.Highlight) return;
    const ranges = [];
    const walker = document.createTreeWalker(list, NodeFilter.SHOW_TEXT);
    while (words.length && walker.nextNode()) {
      const node = walker.currentNode, low = node.data.toLowerCase();
      if (low.length !== node.data.length) continue;
      for (const word of words) {
        for (let at = 0; (at = low.indexOf(word, at)) >= 0; at += word.length) {
          const range = new Range();
          range.setStart(node, at);
          range.setEnd(node, at + word.length);
          ranges.push(range);
        }
      }
    }
    CSS.highlights.set('found', new Highlight(...ranges));
  }

  function update() {
    render();
    history.replaceState(null, '', PREFIX + new URLSearchParams(get()));
  }

  let waiting;
  form.oninput = event => {
    shown = BATCH;
    if (event.target === field.set) set(get());
    clearTimeout(waiting);
    waiting = setTimeout(update, event.target === field.q ? 120 : 0);
  };
  form.onsubmit = event => event.preventDefault();
  form.onreset = event => {
    event.preventDefault();
    set({});
    update();
  };
  more.onclick = () => {
    const first = shown;
    shown += BATCH;
    update();
    list.children[first]?.focus({preventScroll: true});
  };
  window.onhashchange = () => {
    if (location.hash.startsWith(PREFIX)) start(fromAddress());
  };

  function start(state) {
    set(state);
    render();
    document.getElementById('answers').scrollIntoView();
  }

  form.hidden = false;
  if (location.hash.startsWith(PREFIX)) start(fromAddress());
  else {
    set({});
    render();
  }
})();
