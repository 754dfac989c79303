const data = JSON.parse(document.getElementById('data').textContent);

function add(parent, tag, text) {
  const made = document.createElement(tag);
  made.textContent = text;
  parent.append(made);
  return made;
}

// The distribution at one token, in place of the one before.
function showDistribution(at) {
  const found = data.predictions.find(prediction => prediction.at === at);
  document.querySelectorAll('.token.on').forEach(token => token.classList.remove('on'));
  document.querySelector(`.token[data-at="${at}"]`)?.classList.add('on');
  const place = document.getElementById('distribution');
  place.replaceChildren();
  if (!found) {
    add(place, 'p', 'Nothing is predicted here.');
    return;
  }
  add(place, 'h3', found.title);
  for (const part of found.parts) {
    add(place, 'p', part.title).className = 'soft';
    const table = add(place, 'table', '');
    const head = table.insertRow();
    ['token', 'probability', 'log p'].forEach(text => add(head, 'th', text));
    for (const [text, probability, log] of part.rows) {
      const row = table.insertRow();
      add(row, 'td', text);
      const bar = add(add(row, 'td', probability.toFixed(4)), 'span', '');
      bar.className = 'bar';
      bar.style.width = `${(120 * probability).toFixed(1)}px`;
      add(row, 'td', log);
    }
  }
}

// A map in large; the weight under the pointer is read from its opacity.
function enlarge(small) {
  const place = document.getElementById('large');
  place.replaceChildren();
  const said = add(place, 'p', small.alt);
  const image = add(place, 'img', '');
  image.src = small.src;
  image.alt = small.alt;
  const canvas = document.createElement('canvas');
  const [width, height] = [canvas.width, canvas.height] = [small.naturalWidth, small.naturalHeight];
  const pen = canvas.getContext('2d');
  pen.drawImage(small, 0, 0);
  const keys = data.texts[small.dataset.keys], queries = data.texts[small.dataset.queries];
  const cell = (offset, length, count) => Math.min(count - 1, Math.max(0, Math.floor(offset / length * count)));
  image.addEventListener('mousemove', event => {
    const box = image.getBoundingClientRect();
    const key = cell(event.clientX - box.left, box.width, width);
    const query = cell(event.clientY - box.top, box.height, height);
    const weight = (pen.getImageData(key, query, 1, 1).data[3] / 255).toFixed(2);
    said.textContent = `${small.alt}: ${query} ${queries[query]} looks at ${key} ${keys[key]} with ${weight}`;
  });
  place.scrollIntoView({block: 'nearest'});
}

for (const token of document.querySelectorAll('.token[data-at]')) {
  token.addEventListener('click', () => showDistribution(Number(token.dataset.at)));
}
for (const small of document.querySelectorAll('.map img')) small.addEventListener('click', () => enlarge(small));
if (data.first !== null) showDistribution(data.first);
