//go:build !invariants && !race

package atoll

// Invariants reports whether costly internal checks run: in race builds and
// with the build tag "invariants".
const Invariants = false
