"""The assignment of rows to columns with the largest sum."""

from __future__ import annotations

import numpy as np

from ckptool.mapping.matching.sides import Array


def assigned(score: Array) -> tuple[list[int], list[int]]:
    """Returns the rows and columns of the assignment with the largest sum, as many as the shorter side has.

    The Hungarian method with potentials, row by row: O(n^2 m) for n rows and m columns, n the fewer.
    """
    if score.shape[0] > score.shape[1]:
        columns, rows = assigned(score.T)
        order = sorted(range(len(rows)), key=rows.__getitem__)
        return [rows[at] for at in order], [columns[at] for at in order]
    cost = -score
    count, width = cost.shape
    above, left = np.zeros(count + 1), np.zeros(width + 1)
    owner = np.zeros(width + 1, int)  # of each column, its row; rows and columns count from 1
    for row in range(1, count + 1):
        owner[0], column = row, 0
        least, way = np.full(width + 1, np.inf), np.zeros(width + 1, int)
        used = np.zeros(width + 1, bool)
        while column == 0 or owner[column]:
            used[column] = True
            at = owner[column]
            free = ~used[1:]
            reduced = cost[at - 1] - above[at] - left[1:]
            better = free & (reduced < least[1:])
            least[1:][better] = reduced[better]
            way[1:][better] = column
            nearest = int(np.where(free, least[1:], np.inf).argmin()) + 1
            delta = least[nearest]
            above[owner[used]] += delta
            left[used] -= delta
            least[1:][free] -= delta
            column = nearest
        while column:
            owner[column] = owner[way[column]]
            column = way[column]
    pairs = sorted((int(owner[column]) - 1, column - 1) for column in range(1, width + 1) if owner[column])
    return [row for row, _ in pairs], [column for _, column in pairs]
