/**
 * What is told in a corner of the page.
 */

import { app } from "../../scripts/app.js";

/** `severity`: "success", "info", "warn" or "error", which stays longer. */
export function tell(severity, summary, detail) {
  app.extensionManager.toast.add({ severity, summary, detail, life: severity === "error" ? 20_000 : 6_000 });
}
