"""What is compared, fixed before anything was tuned.

* Sales: :func:`envs.inventory.retail.retail_sales`, 40 products, 156 weeks, demand seeds 0 to 4; lost sales.
* Weeks: 16 of history, then 78 of training, 31 of development, 31 held out. Development and held-out costs are means
  over all of their weeks; the 16 weeks before them are simulated as a warm-up that is not counted.
* Costs: a unit on stock costs 1 a week, a lost sale 9. Lead time 4 weeks in one store; in networks 2 weeks from the
  warehouse to a store and 3 weeks to the warehouse, whose stock costs 0.5. With two warehouses a far one delivers in 4
  weeks for nothing, a near one in 1 week for 1 a unit, each within 3 weeks of its supplier.
* Orders are whole units in every score.
* Rules: one set of parameters per product, found by exhaustive search over a grid on the DEVELOPMENT weeks, which is
  where our policy is chosen too. Base stock: levels 0, 1, 2 ... up to the largest sum of lead time plus one weeks of
  the product's training weeks, 60 values. (s, S): the same levels S and s = S - g, g of {0, 1, 2, 3, 5, 8, 12, 20}.
  (r, Q): r of the same levels, Q of 12 values up to eight weeks of mean demand. Seasonal newsvendor: a quantile of
  {0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.975, 0.99} of the normal law of the demand that last year's same weeks and
  the level of the last 16 weeks forecast.
  In networks the levels of all nodes are tuned by coordinate search, product by product, five rounds. (Added once the
  rules were seen to stay in poor corners, which helps them: before it every pair of ten factors, one for the levels of
  all stores and one for those of all warehouses. Added as further rivals: base stock raised by planned promotions, and
  rules tuned on the training weeks.)
* Our policy: the defaults of ``inventory_train.py``; no setting is chosen on held-out weeks.
* Numbers: the held-out cost per product and week of each method, its difference to each rule paired by product and
  seed, with the 95 % interval of Student's t over the demand seeds' means.
"""

from __future__ import annotations

__all__ = ["SEEDS", "SETTINGS"]

SEEDS = (0, 1, 2, 3, 4)

SETTINGS = {
    "store": {"stores": 1, "warehouses": 0},
    "warehouse": {"stores": 5, "warehouses": 1},
    "two_warehouses": {"stores": 5, "warehouses": 2},
}
"""The three cases: one store; one warehouse with five stores; two warehouses that both serve five stores."""
