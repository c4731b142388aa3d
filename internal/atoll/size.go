package atoll

import (
	"fmt"
	"strconv"
	"strings"
)

// ParseSize reads a size such as 512M, 10G, 10GiB (powers of 1024) or 10GB
// (powers of 1000); 4096B is bytes. A number without a unit is refused: it is
// not clear what was meant. ErrInvalid, ErrTooLarge.
func ParseSize(s string) (int64, error) {
	end := strings.IndexFunc(s, func(r rune) bool { return r != '.' && (r < '0' || r > '9') })
	if end == 0 || s == "" {
		return 0, fmt.Errorf("size %q: want a number with a unit, such as 512M or 10G: %w", s, ErrInvalid)
	}
	if end < 0 {
		return 0, fmt.Errorf("size %q has no unit: say %sG for GiB, or %sB for bytes: %w", s, s, s, ErrInvalid)
	}
	unit, ok := unitSize(s[end:])
	if !ok {
		return 0, fmt.Errorf("size %q: unknown unit %q; want B, K, M, G, T, P (powers of 1024), KB, MB, GB… (powers of 1000): %w", s, s[end:], ErrInvalid)
	}
	if n, err := strconv.ParseInt(s[:end], 10, 64); err == nil {
		if n > (1<<62)/unit {
			return 0, fmt.Errorf("size %q: %w", s, ErrTooLarge)
		}
		return n * unit, nil
	}
	f, err := strconv.ParseFloat(s[:end], 64)
	if err != nil {
		return 0, fmt.Errorf("size %q: want a number with a unit, such as 512M or 10G: %w", s, ErrInvalid)
	}
	if f*float64(unit) > 1<<62 {
		return 0, fmt.Errorf("size %q: %w", s, ErrTooLarge)
	}
	return int64(f * float64(unit)), nil
}

// unitSize returns what a unit stands for: K and KiB are 1024, KB is 1000.
func unitSize(unit string) (int64, bool) {
	if strings.EqualFold(unit, "b") {
		return 1, true
	}
	power := strings.IndexByte("KMGTP", strings.ToUpper(unit)[0]) + 1
	base, rest := int64(1024), strings.ToUpper(unit[1:])
	if power == 0 || rest != "" && rest != "B" && rest != "IB" {
		return 0, false
	}
	if rest == "B" {
		base = 1000
	}
	n := int64(1)
	for range power {
		n *= base
	}
	return n, true
}

// FormatSize writes a size as ParseSize reads it, exactly, in the largest unit
// that divides it: 10G, 1536M, 4097B.
func FormatSize(n int64) string {
	for i := 4; i > 0; i-- {
		if unit := int64(1) << (10 * i); n >= unit && n%unit == 0 {
			return strconv.FormatInt(n/unit, 10) + string("KMGT"[i-1])
		}
	}
	return strconv.FormatInt(n, 10) + "B"
}
