"""The page's script: exact values under the pointer, and light or dark by hand. The page is complete without it."""

SCRIPT = """
(() => {
  const tip = document.body.appendChild(document.createElement('div'));
  tip.className = 'tip';
  const told = (value, unit) =>
    unit === 'share' ? (100 * value).toPrecision(3) + ' %' : +value.toPrecision(4) + (unit ? ' ' + unit : '');
  const points = new Map();
  const read = path => points.get(path) || points.set(path, path.dataset.points.split(' ').map(pair => {
    const at = pair.indexOf(':');
    return [+pair.slice(0, at), +pair.slice(at + 1)];
  })).get(path);
  for (const plot of document.querySelectorAll('.plot')) {
    const paths = [...plot.querySelectorAll('[data-points]')];
    const [left, right] = plot.dataset.steps.split(' ').map(Number);
    plot.addEventListener('pointermove', event => {
      const box = plot.getBoundingClientRect();
      const step = left + (right - left) * (event.clientX - box.left) / box.width;
      tip.textContent = '';
      for (const path of paths) {
        const near = read(path).reduce((a, b) => Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a);
        const line = tip.appendChild(document.createElement('div'));
        line.textContent =
          `step ${near[0].toLocaleString('en')}  ${path.dataset.label}  ${told(near[1], path.dataset.unit)}`;
      }
      tip.style.display = 'block';
      const x = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8);
      tip.style.transform = `translate(${Math.max(4, x)}px, ${event.clientY + 16}px)`;
    });
    plot.addEventListener('pointerleave', () => tip.style.display = 'none');
  }
  const button = document.querySelector('.theme');
  button.hidden = false;
  button.addEventListener('click', () => {
    const dark = getComputedStyle(document.documentElement).colorScheme === 'dark'
      || !document.documentElement.dataset.theme && matchMedia('(prefers-color-scheme: dark)').matches;
    document.documentElement.dataset.theme = dark ? 'light' : 'dark';
  });
})();
"""
