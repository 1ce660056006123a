//! Columns as Go's tabwriter sets them for docker.

/// Least width of a column with what parts it from the next.
const LEAST: usize = 10;
const GAP: usize = 3;

/// Lines of cells, each column as wide as its widest cell. The last cell of a line is not padded.
pub(crate) fn columns(lines: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = Vec::new();
    for line in lines {
        for (index, cell) in line.iter().enumerate() {
            if index + 1 == line.len() {
                break;
            }
            let wide = (cell.chars().count() + GAP).max(LEAST);
            match widths.get_mut(index) {
                Some(width) => *width = (*width).max(wide),
                None => widths.push(wide),
            }
        }
    }
    let mut text = String::new();
    for line in lines {
        for (index, cell) in line.iter().enumerate() {
            text.push_str(cell);
            if index + 1 < line.len() {
                let fill = widths[index].saturating_sub(cell.chars().count());
                text.extend(std::iter::repeat_n(' ', fill));
            }
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::columns;

    #[test]
    fn columns_are_at_least_ten_wide_and_three_apart() {
        let lines = [
            vec!["ID".into(), "A LONG HEADER".into(), "X".into()],
            vec!["1".into(), "b".into(), String::new()],
        ];
        assert_eq!(
            columns(&lines),
            "ID        A LONG HEADER   X\n1         b               \n"
        );
    }
}
