// A click sorts by the column, a second one the other way; cells without a
// number stay below those with one.
for (const th of document.querySelectorAll('thead th')) {
  th.firstChild.onclick = () => {
    const up = th.ariaSort !== 'ascending', sign = up ? 1 : -1;
    const text = row => {
      const cell = row.cells[th.cellIndex];
      return cell.dataset.value ?? cell.textContent;
    };
    const number = row => parseFloat(text(row).replace(/[,<]/g, ''));
    const compare = (a, b) => {
      const [x, y] = [number(a), number(b)];
      if (isNaN(x) && isNaN(y)) return sign * text(a).localeCompare(text(b));
      return isNaN(x) - isNaN(y) || sign * (x - y);
    };
    for (const other of th.parentNode.cells) other.removeAttribute('aria-sort');
    th.ariaSort = up ? 'ascending' : 'descending';
    const body = th.closest('table').tBodies[0];
    body.append(...[...body.rows].sort(compare));
  };
}
