/**
 * The pack's stylesheets, each in the page once.
 */

/** The `link` of the stylesheet at an address, added where it is not there yet; it has a `sheet` once it acts. */
export function addStyle(address) {
  const there = document.querySelector(`link[href="${address}"]`);
  if (there) return there;
  const link = document.createElement("link");
  Object.assign(link, { rel: "stylesheet", href: address });
  document.head.append(link);
  return link;
}
